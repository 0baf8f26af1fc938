"""How a trained model reads long text into its memory, and writes."""
