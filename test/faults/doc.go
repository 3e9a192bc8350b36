// Package faults runs a gateway on a store and a network that misbehave all the time: guests must not notice.
package faults
