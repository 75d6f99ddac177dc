"""OpenAI's dialect, with the extra fields of vLLM that have a meaning here."""
