"""The parts of `data_services.mine`: unique texts, their vectors, search, guides, filters, what is reported."""
