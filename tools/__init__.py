"""What builds something out of the sources beside the wheel."""
