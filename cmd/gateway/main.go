// Command gateway presents virtual disks to virtual machines and keeps them in blob stores.
//
// Each command has a file of its own: newXCmd returns it, its options are a struct, and its run
// function gets a context that ends with SIGINT or SIGTERM. Results go to stdout, the rest to stderr.
// How the process ends is decided in one place, exit.go.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program: it runs the command in args, reports its error and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	a := &app{stdout: stdout, stderr: stderr}
	root := newRootCmd(a)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err != nil && !a.started {
		where := "usage: " + cmd.UseLine()
		if cmd.HasSubCommands() {
			where = fmt.Sprintf("see \"%s --help\"", cmd.CommandPath())
		}
		err = usagef("%s; %s", strings.Join(strings.Fields(err.Error()), " "), where) // the command line never got as far as a command
		a.json = a.json || slices.Contains(args, "--json")
	}
	return a.report(err)
}
