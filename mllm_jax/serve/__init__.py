"""An OpenAI-compatible server over `inference`: requests that arrive together are decoded together."""
