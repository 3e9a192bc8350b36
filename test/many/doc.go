// Package many serves many disks from one gateway with little memory.
package many
