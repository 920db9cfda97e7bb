"""Draw plots and render HTML pages. The look of every report is decided here."""
