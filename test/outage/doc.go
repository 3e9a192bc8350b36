// Package outage takes the stores away from a gateway under load: nothing may fail, and only what needs
// a store may wait.
package outage
