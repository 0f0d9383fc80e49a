"""Sifters: functions from (images, labels) to a verdict per sample. None is built yet."""
