"""Each module prints a table: what is measured beside the thing it is compared to, in one run."""
