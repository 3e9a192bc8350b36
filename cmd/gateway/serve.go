package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"graindisk/api"
	"graindisk/config"
	"graindisk/frontend/nbd"
)

type serveOptions struct {
	disks    []string
	takeover bool
	debug    bool
}

func newServeCmd(a *app) *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the disks of the configured pools over NBD",
		Long: `Serve stays in the foreground, logs on stderr, and prints one line on stdout once clients are
accepted: "ready URI [URI...]". SIGTERM and SIGINT end it cleanly: everything is published and the
pools are released. If the targets do not answer within shutdown_timeout it ends with code 1, the log
intact and the pools held; start it again to go on.

With --data DIR and no configuration file it runs the embedded default: pool main on the directories
DIR/targets/{a,b,c}, which it creates if nothing is there yet.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runServe(cmd.Context(), a, o) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.disks, "disk", nil, "with --data: a disk to serve, NAME=SIZE, created if it is missing (repeatable)")
	f.BoolVar(&o.takeover, "takeover", false, "take pools that another owner holds, giving up what that owner acknowledged but did not publish")
	f.BoolVar(&o.debug, "debug", false, "log more")
	return cmd
}

func runServe(ctx context.Context, a *app, o serveOptions) (err error) {
	cfg, err := a.loadConfig(o.disks)
	if err != nil {
		return err
	}
	log := newLogger(a, o.debug)
	data, err := lockData(cfg.Data)
	if err != nil {
		return err
	}
	defer data.unlock()
	if cfg.Embedded {
		log.Info("embedded default", "data", cfg.Data, "targets", filepath.Join(cfg.Data, "targets", "{a,b,c}"),
			"stripe", cfg.Pools["main"].Stripe.String(), "tier", cfg.Tier.Dir, "tier_size", cfg.Tier.Size.String(),
			"ram", cfg.Tier.RAM.String(), "max_dirty_age", cfg.Pools["main"].MaxDirtyAge.String())
	}
	limitMemory(cfg, log)
	g, err := openGateway(ctx, cfg, o.takeover, data, log)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		log.Info("ended before serving")
		return nil
	}
	if err != nil {
		return err
	}
	alive, dying := context.WithCancel(context.WithoutCancel(ctx))
	var signing sync.WaitGroup
	signing.Go(func() { data.signLife(alive, g.logs, log) })
	serveErr := serveClients(ctx, a, cfg, g, log)
	dying() // closing gives the pools away
	signing.Wait()

	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownTimeout)
	defer cancel()
	return errors.Join(serveErr, g.close(cctx))
}

// serveClients opens the sockets, says that they are ready, and serves until ctx ends; then requests
// already read are answered. It returns nil if ctx ended it.
func serveClients(ctx context.Context, a *app, cfg *config.Config, g *gateway, log *slog.Logger) error {
	m := newMetrics(g)
	srv, err := nbd.New(nbd.Options{Exports: g, Log: log, Metrics: m.nbd()})
	if err != nil {
		return err
	}
	socks, err := listenAll(cfg)
	if err != nil {
		return err
	}
	// The listeners end with sctx: when ctx does, or when one of them fails. NBD is drained instead.
	eg, sctx := errgroup.WithContext(ctx)
	metrics := promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
	eg.Go(func() error { return api.Serve(sctx, socks.admin, api.Handler(g, metrics), log) })
	if socks.metrics != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", metrics)
		eg.Go(func() error { return api.Serve(sctx, socks.metrics, mux, log) })
	}
	for i, ln := range socks.nbd {
		stable := cfg.Listen.NBD[i].Ack == config.AckStable
		eg.Go(func() error {
			err := srv.Serve(context.WithoutCancel(ctx), ln, nbd.ListenOptions{AckStable: stable})
			if errors.Is(err, nbd.ErrShutdown) {
				return nil
			}
			return fmt.Errorf("listener %s: %w", cfg.Listen.NBD[i].Address, err)
		})
	}
	eg.Go(func() error {
		<-sctx.Done()
		log.Info("shutting down")
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownTimeout)
		defer cancel()
		return srv.Shutdown(dctx)
	})
	fmt.Fprintln(a.stdout, "ready", strings.Join(uris(cfg, g, socks), " "))
	return eg.Wait()
}

// uris are those of every disk behind every NBD listener, or of the listeners if there is no disk.
func uris(cfg *config.Config, g *gateway, s *sockets) []string {
	var out []string
	names := g.List()
	if len(names) == 0 {
		names = []string{""}
	}
	for i, ln := range s.nbd {
		for _, d := range names {
			out = append(out, cfg.Listen.NBD[i].URI(d, ln.Addr().String()))
		}
	}
	return out
}

// sockets are everything a gateway listens on.
type sockets struct {
	nbd     []net.Listener
	admin   net.Listener
	metrics net.Listener // may be nil
}

// listenAll opens every socket of the configuration, or none.
func listenAll(cfg *config.Config) (_ *sockets, err error) {
	s := new(sockets)
	var open []net.Listener
	defer func() {
		if err != nil {
			for _, l := range open {
				l.Close()
			}
		}
	}()
	add := func(network, addr string) (net.Listener, error) {
		l, err := listen(network, addr)
		if err == nil {
			open = append(open, l)
		}
		return l, err
	}
	for _, n := range cfg.Listen.NBD {
		l, err := add(n.Network(), n.Addr())
		if err != nil {
			return nil, err
		}
		s.nbd = append(s.nbd, l)
	}
	if s.admin, err = add("unix", cfg.AdminSocket()); err != nil {
		return nil, err
	}
	if cfg.Listen.Metrics != "" {
		if s.metrics, err = add("tcp", cfg.Listen.Metrics); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// listen opens one socket. A unix socket that a dead gateway left behind is replaced: the caller holds
// the lock of the data directory. One that somebody answers on is not.
func listen(network, addr string) (net.Listener, error) {
	if network == "unix" {
		if err := os.MkdirAll(filepath.Dir(addr), 0o700); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", addr, err)
		}
		if c, err := net.Dial("unix", addr); err == nil {
			c.Close()
			return nil, fmt.Errorf("listen on %s: another process answers there; stop it, or configure another socket", addr)
		}
	}
	l, err := nbd.Listen(network+"://"+addr, true)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

func newLogger(a *app, debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	o := &slog.HandlerOptions{Level: level}
	if a.json {
		return slog.New(slog.NewJSONHandler(a.stderr, o))
	}
	return slog.New(slog.NewTextHandler(a.stderr, o))
}
