"""UltraChat 2: from topics to a filtered, balanced data set with a card, by any models."""
