"""The stages of the flywheel: one file each, readable as the algorithm. Importing this is cheap."""
