# A boot sector that drives its disk through the BIOS: it copies 64 sectors, changed, to another place,
# and where sector 1 begins with an L it then goes on writing for ever. It ends QEMU through
# isa-debug-exit at port 0xf4.
.code16
.globl _start
_start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    movb %dl, drive
    cld

    movl $1, lba
    movw $0x4200, %ax
    call disk
    movb 0x8000, %al
    movb %al, mode

    movl $64, lba
    movw $0x4200, %ax
    call disk
    movw $0x8000, %si
    movw $0x8000, %cx
1:  xorb $0x5a, (%si)
    incw %si
    loop 1b
    movl $1024, lba
    movw $0x4300, %ax
    call disk

    movl $0x10, %ebx
    cmpb $'L', mode
    jne out

again:
    incb number
    movb number, %al
    movw $0x8000, %di
    movw $0x8000, %cx
    rep stosb
    movl $2048, lba
    movw $0x4300, %ax
    call disk
    movw $0x8000, %di
    movw $0x8000, %cx
    xorb %al, %al
    rep stosb
    movw $0x4200, %ax
    call disk
    movb number, %al
    movw $0x8000, %di
    movw $0x8000, %cx
    repe scasb
    je again
    movl $0x12, %ebx
    jmp out

# Reads (AX 0x4200) or writes (AX 0x4300) 64 sectors at 0x8000.
disk:
    movw $packet, %si
    movb drive, %dl
    int $0x13
    jc failed
    ret
failed:
    movl $0x11, %ebx
out:
    movl %ebx, %eax
    movw $0xf4, %dx
    outl %eax, %dx
2:  hlt
    jmp 2b

drive:  .byte 0
mode:   .byte 0
number: .byte 0
.balign 4
packet: .byte 16, 0
        .word 64, 0x8000, 0
lba:    .long 0, 0

.org 510
    .word 0xaa55
