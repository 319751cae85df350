"""Sources: readers of published data sets. A source lists the records of one data set or format (see `record`)."""
