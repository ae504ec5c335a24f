"""UltraChat 2: from topics to a clean, balanced, documented data set, by any model behind an endpoint or in this process."""
