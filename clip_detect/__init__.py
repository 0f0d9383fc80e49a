"""Detection as mathematics: functions from arrays to arrays."""
