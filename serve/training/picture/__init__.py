"""The preview picture of a bot, and how its text is set."""
