"""The endpoint: OpenAI's protocol and a chat page over HTTP, on the node of rank 0."""
