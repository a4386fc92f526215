"""Train the miniature on one accelerator in minutes: everything stays on the device."""
