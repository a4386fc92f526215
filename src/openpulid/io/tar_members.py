"""Tar archives (shards of WebDataset): files are read at their offsets without unpacking."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from openpulid.errors import TrainingError
from openpulid.io.files import replace_file


@dataclass(frozen=True)
class TarMember:
    """A file inside an archive that is not compressed.

    Attributes:
        archive: path of the archive.
        offset: of the first byte of the file.
        size: in bytes.
    """

    archive: Path
    offset: int
    size: int

    def read(self, max_bytes: int | None = None) -> bytes:
        """Return the first bytes of the file, or all of them.

        Raises:
            OSError: the archive cannot be read, or is shorter than before.
        """
        size = self.size if max_bytes is None else min(self.size, max_bytes)
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{self.archive} is shorter than when it was listed")
        return data


def list_members(archive: Path) -> dict[str, TarMember]:
    """List the files of an archive by name; of several with one name the last counts.

    Raises:
        TrainingError: it is compressed, damaged, or no tar archive.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            return {
                member.name: TarMember(archive, member.offset_data, member.size)
                for member in tar
                if member.isreg()
            }
    except (OSError, tarfile.TarError) as error:
        raise TrainingError(
            f"{archive} cannot be read as a tar archive without compression ({error}); "
            "unpack it, or pack it again with tar -cf."
        ) from None


class TarWriter:
    """Writes files into an archive that depends on their names and contents alone.

    Args:
        tar: an archive that is open for writing.
    """

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar

    def add(self, name: str, data: bytes) -> int:
        """Append a file.

        Args:
            name: ASCII, at most 100 characters.
            data: its content.

        Returns:
            The offset of the content in the archive.
        """
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self.tar.addfile(info, BytesIO(data))
        blocks = -(-len(data) // tarfile.BLOCKSIZE)
        return self.tar.offset - blocks * tarfile.BLOCKSIZE


@contextmanager
def write_tar(path: Path, *, private: bool = False) -> Iterator[TarWriter]:
    """Write an archive that is complete or absent, see `files.replace_file`.

    Raises:
        OutputError: it cannot be written.
    """
    with (
        replace_file(path, private=private) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        yield TarWriter(tar)
