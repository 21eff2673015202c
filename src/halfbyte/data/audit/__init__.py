"""What would go wrong with the data, found before step 1; docs/audit.md lists the findings."""
