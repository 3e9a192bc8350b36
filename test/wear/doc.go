// Package wear counts what a gateway writes to its SSD for each byte that a guest writes.
package wear
