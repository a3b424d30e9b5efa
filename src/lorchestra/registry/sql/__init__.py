"""The catalog: tables, transactions, the log of what was done."""
