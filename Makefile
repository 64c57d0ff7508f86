# The people's entry. No logic in here.
.PHONY: test
test:
	cargo test --release -p exitmeter-meter
