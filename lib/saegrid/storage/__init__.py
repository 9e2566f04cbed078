"""Files that survive a crash: written beside and renamed into place, with checksums and locks."""
