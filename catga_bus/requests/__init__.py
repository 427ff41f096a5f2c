"""The request lane: who asks (`caller`), who answers (`responder`), and the pure rules between them."""
