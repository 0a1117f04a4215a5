"""Ask whether a real language model thinks on natural text, the worked solutions of GSM8K."""
