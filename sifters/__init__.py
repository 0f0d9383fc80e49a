"""Sifters: functions from (images, labels) to a verdict per sample. No command uses them yet."""
