// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Base} from "./Base.sol";
import {Wallet} from "./mocks/Wallets.sol";
import {vm} from "./Vm.sol";

interface ICoaseToken {
    function name() external view returns (string memory);
    function symbol() external view returns (string memory);
    function decimals() external view returns (uint8);
    function totalSupply() external view returns (uint256);
    function SUPPLY() external view returns (uint256);
    function nonces(address owner) external view returns (uint256);
    function permit(address, address, uint256, uint256, uint8, bytes32, bytes32) external;
    function authorizationState(address authorizer, bytes32 nonce) external view returns (bool);
    function transferWithAuthorization(
        address, address, uint256, uint256, uint256, bytes32, uint8, bytes32, bytes32
    ) external;
    function transferWithAuthorization(address, address, uint256, uint256, uint256, bytes32, bytes calldata) external;
    function receiveWithAuthorization(
        address, address, uint256, uint256, uint256, bytes32, uint8, bytes32, bytes32
    ) external;
    function receiveWithAuthorization(address, address, uint256, uint256, uint256, bytes32, bytes calldata) external;
    function cancelAuthorization(address, bytes32, uint8, bytes32, bytes32) external;
    function cancelAuthorization(address, bytes32, bytes calldata) external;
    function delegate(address) external;
    function getVotes(address) external view returns (uint256);
    function clock() external view returns (uint48);
    function eip712Domain()
        external
        view
        returns (bytes1, string memory, string memory, uint256, address, bytes32, uint256[] memory);
}

contract TokenTest is Base {
    bytes32 private constant TRANSFER_TYPE = 0x7c7c6cdb67a18743f49ec6fa9b35f50d52ed05cbed4cc592e13b44501c1a2267;
    bytes32 private constant RECEIVE_TYPE = 0xd099cc98ef71107a616c4f0f941f04c322d8e254fe26b3c6668db87aae413de8;
    bytes32 private constant NONCE = keccak256("any nonce");

    ICoaseToken private _coase;

    function setUp() public override {
        super.setUp();
        _coase = ICoaseToken(address(token));
    }

    function test_names() public view {
        vm.assertEq(_coase.name(), "Coase", "name");
        vm.assertEq(_coase.symbol(), "COASE", "symbol");
        vm.assertEq(uint256(_coase.decimals()), 6, "decimals");
        vm.assertEq(_coase.totalSupply(), 1_000_000_000e6, "supply");
        (, string memory name, string memory version,,,,) = _coase.eip712Domain();
        vm.assertEq(name, "Coase", "domain name");
        vm.assertEq(version, "1", "domain version");
    }

    function test_typeHashesAreThoseOfTheStandard() public pure {
        string memory rest =
            "(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,bytes32 nonce)";
        vm.assertEq(keccak256(bytes(string.concat("TransferWithAuthorization", rest))), TRANSFER_TYPE, "transfer");
        vm.assertEq(keccak256(bytes(string.concat("ReceiveWithAuthorization", rest))), RECEIVE_TYPE, "receive");
    }

    function test_transferWithAuthorizationBothForms() public {
        (uint8 v, bytes32 r, bytes32 s) = _authorize(BUYER_KEY, TRANSFER_TYPE, seller, NONCE);
        uint256 state = vm.snapshotState();
        vm.startPrank(stranger);
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.assertEq(token.balanceOf(seller), 1_000_005, "moved");
        vm.assertTrue(_coase.authorizationState(buyer, NONCE), "used");
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, abi.encodePacked(r, s, v));
        vm.revertToState(state);
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, abi.encodePacked(r, s, v));
        vm.assertEq(token.balanceOf(seller), 1_000_005, "moved");
        vm.stopPrank();
    }

    function test_receiveWithAuthorizationIsForThePayeeAlone() public {
        (uint8 v, bytes32 r, bytes32 s) = _authorize(BUYER_KEY, RECEIVE_TYPE, seller, NONCE);
        bytes memory sig = abi.encodePacked(r, s, v);
        vm.prank(stranger);
        vm.expectRevert();
        _coase.receiveWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.prank(stranger);
        vm.expectRevert();
        _coase.receiveWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, sig);
        uint256 state = vm.snapshotState();
        vm.prank(seller);
        _coase.receiveWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.assertEq(token.balanceOf(seller), 1_000_005, "moved");
        vm.revertToState(state);
        vm.prank(seller);
        _coase.receiveWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, sig);
        vm.assertEq(token.balanceOf(seller), 1_000_005, "moved");
        // The one kind does not pass for the other.
        vm.revertToState(state);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, sig);
    }

    function test_authorizationTimes() public {
        (uint8 v, bytes32 r, bytes32 s) = _authorize(BUYER_KEY, TRANSFER_TYPE, seller, NONCE);
        vm.warp(START - 1);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.warp(START + 1);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.warp(START);
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
    }

    /// @notice Times are times: no bit of them makes a block number of the rest.
    function test_authorizationTimesAreSeconds() public {
        uint256 flag = 1 << 47;
        bytes32 structHash = keccak256(abi.encode(TRANSFER_TYPE, buyer, seller, 5, flag, flag + 1000, NONCE));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(BUYER_KEY, tokenDigest(structHash));
        vm.roll(5);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, flag, flag + 1000, NONCE, v, r, s);
    }

    function test_cancelBothForms() public {
        bytes32 structHash = keccak256(
            abi.encode(keccak256("CancelAuthorization(address authorizer,bytes32 nonce)"), buyer, NONCE)
        );
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(BUYER_KEY, tokenDigest(structHash));
        uint256 state = vm.snapshotState();
        _coase.cancelAuthorization(buyer, NONCE, v, r, s);
        vm.assertTrue(_coase.authorizationState(buyer, NONCE), "cancelled");
        vm.revertToState(state);
        _coase.cancelAuthorization(buyer, NONCE, abi.encodePacked(r, s, v));
        (v, r, s) = _authorize(BUYER_KEY, TRANSFER_TYPE, seller, NONCE);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
    }

    function test_contractWalletAuthorizes() public {
        Wallet wallet = new Wallet(vm.addr(0xAAA));
        token.transfer(address(wallet), 100);
        bytes32 structHash = keccak256(
            abi.encode(TRANSFER_TYPE, address(wallet), seller, 5, START - 1, START + 1, NONCE)
        );
        bytes memory sig = sign(0xAAA, tokenDigest(structHash));
        _coase.transferWithAuthorization(address(wallet), seller, 5, START - 1, START + 1, NONCE, sig);
        vm.assertEq(token.balanceOf(address(wallet)), 95, "moved");
    }

    function test_anotherSigner() public {
        (uint8 v, bytes32 r, bytes32 s) = _authorize(SELLER_KEY, TRANSFER_TYPE, seller, NONCE);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, v, r, s);
        vm.expectRevert();
        _coase.transferWithAuthorization(buyer, seller, 5, START - 1, START + 1, NONCE, abi.encodePacked(r, s, v));
    }

    function test_permitNoncesByOne() public {
        for (uint256 i = 0; i < 3; ++i) {
            vm.assertEq(_coase.nonces(buyer), i, "nonce");
            bytes memory sig = byPermit(BUYER_KEY, 7, START).sig;
            (bytes32 r, bytes32 s) = (bytes32(0), bytes32(0));
            assembly ("memory-safe") {
                r := mload(add(sig, 0x20))
                s := mload(add(sig, 0x40))
            }
            _coase.permit(buyer, address(escrow), 7, START, uint8(sig[64]), r, s);
            vm.expectRevert();
            _coase.permit(buyer, address(escrow), 7, START, uint8(sig[64]), r, s);
        }
    }

    function test_votes() public {
        vm.assertEq(_coase.getVotes(buyer), 0, "not delegated");
        vm.prank(buyer);
        _coase.delegate(buyer);
        vm.assertEq(_coase.getVotes(buyer), 1_000_000, "delegated");
        open(someTerms());
        vm.assertEq(_coase.getVotes(buyer), 1_000_000 - PRICE, "what is in escrow does not vote");
        vm.assertEq(uint256(_coase.clock()), START, "by time");
    }

    function testFuzz_supplyIsConstant(uint256 amount) public {
        vm.prank(buyer);
        token.transfer(seller, amount % 1_000_001);
        vm.assertEq(_coase.totalSupply(), _coase.SUPPLY(), "supply");
    }

    function _authorize(uint256 key, bytes32 kind, address to, bytes32 nonce)
        private
        view
        returns (uint8, bytes32, bytes32)
    {
        bytes32 structHash = keccak256(abi.encode(kind, buyer, to, 5, START - 1, START + 1, nonce));
        return vm.sign(key, tokenDigest(structHash));
    }
}
