"""Data of text detection: readers of the public formats, augmentation and a renderer of synthetic scenes."""
