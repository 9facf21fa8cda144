"""What Rookery is measured against, each in a module of its own."""
