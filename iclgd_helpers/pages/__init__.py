"""What pages show: selected records, tables, figures, published numbers."""
