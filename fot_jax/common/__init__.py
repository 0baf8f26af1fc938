"""Used everywhere: errors, paths, atomic files, checksums, formats, progress, agreement."""
