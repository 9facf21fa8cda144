"""From someone's archive to a new model revision."""
