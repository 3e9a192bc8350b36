package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"graindisk/backend/backendtest/azuritetest"
	"graindisk/backend/backendtest/miniotest"
)

// Site is the configuration of a pool "main" and the tier that it names.
type Site struct{ Config, Tier string }

// NewSite makes a pool of profile 2+1 on three buckets of one server. tier is a size, disks are what goes
// into the configuration's list.
func NewSite(t testing.TB, store *miniotest.Server, tier string, dirtyAge time.Duration, disks string) Site {
	t.Helper()
	return NewSiteOn(t, []string{S3Target(t, store), S3Target(t, store), S3Target(t, store)}, tier, dirtyAge, disks)
}

// S3Target is what a new bucket of the server is in the configuration, but for its name.
func S3Target(t testing.TB, store *miniotest.Server) string {
	t.Helper()
	return fmt.Sprintf("s3: {endpoint: %q, bucket: %s, path_style: true, access_key_id: %s, secret_access_key: %s}",
		store.Endpoint, store.Bucket(t), miniotest.AccessKey, miniotest.SecretKey)
}

// AzureTarget is what a new container of the server is in the configuration, but for its name.
func AzureTarget(t testing.TB, store *azuritetest.Server) string {
	t.Helper()
	return fmt.Sprintf("azure: {endpoint: %q, account: %s, container: %s, account_key: %q}",
		store.Endpoint, azuritetest.Account, store.Container(t), azuritetest.AccountKey)
}

// NewSiteOn makes a pool of profile 2+1 on the targets, at least three.
func NewSiteOn(t testing.TB, targets []string, tier string, dirtyAge time.Duration, disks string) Site {
	t.Helper()
	dir := t.TempDir()
	s := Site{filepath.Join(dir, "gateway.yaml"), filepath.Join(dir, "tier")}
	var list strings.Builder
	for i, target := range targets {
		fmt.Fprintf(&list, "      - {name: t%d, %s}\n", i, target)
	}
	text := fmt.Sprintf(`data: %q
tier: {dir: %q, size: %s, ram: 64MiB}
pools:
  main:
    stripe: {data: 2, parity: 1}
    max_dirty_age: %v
    targets:
%s    disks: [%s]
`, filepath.Join(dir, "data"), s.Tier, tier, dirtyAge, list.String(), disks)
	if err := os.WriteFile(s.Config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	Must(t, Binary(t), "pool", "create", "main", "--config", s.Config)
	return s
}
