"""What every room uses: errors, paths on disks and in buckets, progress, sizes, agreement."""
