"""One port that speaks the APIs of OpenAI, Ollama and Anthropic."""
