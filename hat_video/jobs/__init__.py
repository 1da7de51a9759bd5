"""The uses: plan a clip into segments, work on them, join and prove; one file, many files, later a camera."""
