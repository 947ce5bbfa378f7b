"""Model in, graph, facts, cost, lowering, artifact out; the core that passes build on."""
