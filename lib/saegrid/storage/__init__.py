"""Files that survive a crash: temporary files renamed into place, with checksums and locks."""
