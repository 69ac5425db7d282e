"""Between the halves: reads stores, writes which layers a student learns from."""
