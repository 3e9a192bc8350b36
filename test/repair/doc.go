// Package repair loses targets for good under a running gateway, on real servers, and has them replaced.
package repair
