"""`statistics`: what fisher and regmean must know of each adapter's data."""

from .run import StatisticsReport, statistics

__all__ = ["StatisticsReport", "statistics"]
