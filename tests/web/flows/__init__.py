"""What people do with the page, each a function whose name is a sentence."""
