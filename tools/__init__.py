"""What only maintainers run: building the book, refreshing its notebooks, pages that are generated."""
