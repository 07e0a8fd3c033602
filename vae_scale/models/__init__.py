"""The networks. They know no data and no trainer."""
