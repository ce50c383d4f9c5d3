"""The page's figures, a file a kind."""
