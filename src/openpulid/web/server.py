"""How the page is served: to its own browser tab alone, and without Gradio's services."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openpulid.io.serving import SameOriginMiddleware, own_hosts

REFUSAL = (
    "The page is only served to itself. Open it by the IP address of its machine, or as localhost."
)


def launch_options(host: str) -> dict[str, Any]:
    """Return the arguments of `Blocks.launch` for a private page.

    Gradio would store photos and prompts in the browser, offer to send them to a bucket, and
    advertise a public link.

    Args:
        host: the address that is served.
    """
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse

    guard = Middleware(
        SameOriginMiddleware,
        is_own_host=own_hosts(host),
        refusal=PlainTextResponse(REFUSAL, 403),
    )
    return {
        "theme": _create_theme(),
        "css_paths": Path(__file__).with_name("page.css"),
        "server_name": host,
        "share": False,
        "quiet": True,
        "run_history": False,
        "footer_links": [],
        "max_file_size": "50mb",
        "app_kwargs": {"middleware": [guard]},
    }


def _create_theme() -> Any:
    """Create a theme with local fonts, in which all texts have a contrast of 4.5 or more."""
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    return theme.set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
