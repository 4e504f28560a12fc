"""The `statistics` command: statistics of each adapter's data, as fisher and regmean need them."""

from .run import StatisticsReport, statistics

__all__ = ["StatisticsReport", "statistics"]
