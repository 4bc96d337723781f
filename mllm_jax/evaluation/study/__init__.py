"""The results of a sweep: kept small, compared with intervals, and shown."""
