"""A model and an adapter as llama.cpp and Ollama take them."""
