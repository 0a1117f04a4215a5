"""What measurements and commands print and keep: tables, records, traces."""
