"""Find poisoned samples in image-text dumps and write a cleaned dump with the evidence."""

__version__ = "0.1.0"
